"""Diffusion Transformers with DTop-p Mixture-of-Experts: training, sampling and evaluation."""
