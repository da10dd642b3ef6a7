"""What a run does, chunk of steps by chunk, whoever starts its workers: train, log, evaluate, save, recover, resize."""
