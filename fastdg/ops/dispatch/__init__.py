"""How a call of an op reaches the code that computes it, in eager code and in autograd."""
