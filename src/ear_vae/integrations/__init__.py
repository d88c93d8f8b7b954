"""The model as other programs call theirs, one module for each; none of them is needed by the package.

Each module imports the library that it is for, and says how to install it where it is missing.
"""
