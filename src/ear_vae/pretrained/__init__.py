"""From a name to config and weights, and back: folders, the Hub, official layouts, bundled checkpoints."""
