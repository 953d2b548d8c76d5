"""Training methods: ABSLD and those it is compared with."""
