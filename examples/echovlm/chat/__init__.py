"""A page to question a trained checkpoint on, with its experts beside the answer."""
