"""How a model is run: in exact tiles, on streams, on a GPU beside the copies, and from recorded graphs."""
