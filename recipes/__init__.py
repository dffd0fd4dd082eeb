"""Recipes ship with the wheel; each YAML file here is one run. ``grpo recipes`` lists them, and a name is enough."""
