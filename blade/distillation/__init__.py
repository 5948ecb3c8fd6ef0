"""Distillation of few-step students together with sparse attention."""
