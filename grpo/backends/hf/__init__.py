"""The backend that generates with transformers in the training process, from the trainer's own weights.

Others take ``backend.HFBackend``."""
