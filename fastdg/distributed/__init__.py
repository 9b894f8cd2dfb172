"""Multi-rank training with DistributedDataParallel and FSDP2: process groups and tensors."""
