"""The EchoVLM recipe: ultrasound cases, two-stage training, evaluation and figures (arXiv 2509.14977)."""
