"""One file per op: signature, docstring with the formula, checks, torch.library registration with fake and autograd."""
