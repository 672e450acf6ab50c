"""The parts of custom_encoder.py: its sentences, and how the encoder is rounded, trained and read back."""
