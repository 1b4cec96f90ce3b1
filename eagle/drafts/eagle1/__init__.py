"""EAGLE-1 (arXiv 2401.15077): one layer that extrapolates the target's last hidden state."""
