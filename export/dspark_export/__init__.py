"""Exports of verifier and drafter checkpoints to servable artifacts."""
