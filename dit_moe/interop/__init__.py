"""Ways in and out: the classes of `transformers` and diffusers, OLMoE's checkpoints, folders to share."""
