"""How a forward pass is run: the memory plan (`memory.py`) and the runners of the trunk (`runners.py`)."""
