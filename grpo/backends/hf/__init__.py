"""The backend that generates with transformers in the training process, from the trainer's own weights.

Other rooms import ``backend.HFBackend`` and ``draw.sample`` only.
"""
