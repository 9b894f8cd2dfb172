"""Which sample each entry of a gradient belongs to."""
