"""Decoding as pure transitions on one `DecodeCarry`."""
