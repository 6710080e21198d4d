"""The fast path: one forward for encoder and decoder over any module tree of this shape, ours or diffusers'."""
