"""How others keep the models of this family, and the way to our layout and back."""
