"""Several ranks: one model cut between GPUs. A model on one device needs `group` alone, for a group of one."""
