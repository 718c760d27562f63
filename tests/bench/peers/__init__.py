"""Other engines, each in a process of its own; these modules run in the environment of requirements-peers.txt."""
