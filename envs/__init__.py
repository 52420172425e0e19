"""The simulated world in which policies are trained and compared. It drives the production machines."""


def register() -> None:
    """Register `tierwise/Placement-v0`; gymnasium calls this through its entry point."""
    import gymnasium

    if "tierwise/Placement-v0" not in gymnasium.registry:
        gymnasium.register("tierwise/Placement-v0", entry_point="envs.placement:PlacementEnv")
