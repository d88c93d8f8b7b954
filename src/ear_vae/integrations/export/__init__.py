"""A model as files that other runtimes execute: the graphs, and the formats that are written from them."""
