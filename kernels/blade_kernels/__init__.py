"""Block-sparse attention for video transformers: masks, selection and attention. Imports nothing of BLADE."""
