"""Training of a drafter for an exported target, from text that the target writes itself (DESIGN, "Training")."""
