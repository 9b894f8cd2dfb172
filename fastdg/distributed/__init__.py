"""Several ranks, DistributedDataParallel and FSDP2: process groups and tensors."""
