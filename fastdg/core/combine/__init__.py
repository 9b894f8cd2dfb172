"""Machinery of algorithms that combine the domains' gradients into one."""
