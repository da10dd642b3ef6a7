"""Ray: the actors that own blocks of layers, and the driver that runs them."""
