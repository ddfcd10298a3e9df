"""What needs Bullet, in an environment of its own: `make bullet`."""
