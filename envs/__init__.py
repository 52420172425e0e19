"""The simulated world in which policies are trained: it drives the production machines.

Importing this package registers `tierwise/Placement-v0` (gymnasium 1.x loads no plugins by itself):
`import envs`, or `gymnasium.make("envs:tierwise/Placement-v0")`.
"""

import gymnasium

gymnasium.register("tierwise/Placement-v0", entry_point="envs.placement:PlacementEnv")
