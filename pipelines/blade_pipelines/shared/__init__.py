"""Shared parts of the adapters of Diffusers' transformers."""
