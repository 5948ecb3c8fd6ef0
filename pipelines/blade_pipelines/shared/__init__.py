"""Shared parts of the adapters for Diffusers' transformers."""
