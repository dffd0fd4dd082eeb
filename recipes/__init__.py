"""Recipes ship with the wheel; each YAML file here is one run. ``grpo train NAME.yaml`` takes any path."""
