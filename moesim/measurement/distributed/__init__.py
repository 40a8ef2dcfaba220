"""Layers, blocks and training steps over a process group of torch.distributed; one process needs no group."""
