"""The parts of custom_vision.py: the network, its pictures, and how it is rounded, trained and scored."""
