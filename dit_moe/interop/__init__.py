"""Other suites' models in and out: the classes of `transformers`, OLMoE's checkpoints, folders to share."""
