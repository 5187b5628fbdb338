"""A run or a sweep seen from another process: what its folder says, and pictures of that for a terminal."""
