"""An environment as a user of this suite writes one, which tests train on: `--env own_env:OwnPoint-v0`, with tests/ as working directory."""

import gymnasium
import numpy as np
from gymnasium import spaces


class OwnPoint(gymnasium.Env):
    """A point in the plane that is paid for going fast to the right, and costs inside strips that lie across its way.

    A step is 0.1 s of a point mass of 1 kg with friction. The point goes round: x is in [0, 4), and the strip is x < 1.

    - Action (2,): force in N, in [-2, 2].
    - Observation (6,), float64: cos and sin of the angle 2 pi x / 4, y (m), velocity (m/s), the speed's share of the limit.
    - Reward: the way along x, m. Cost: 1 inside the strip where the speed is above 1 m/s, in info["cost"].
    - An episode terminates where |y| > 3 m. `max_episode_steps` of the registration, 100, truncates it.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    LENGTH, STRIP, LIMIT, WIDTH, SECONDS = 4.0, 1.0, 1.0, 3.0, 0.1

    def __init__(self, render_mode: str | None = None):
        self.render_mode = render_mode
        self.observation_space = spaces.Box(-np.inf, np.inf, (6,), np.float64)
        self.action_space = spaces.Box(-2.0, 2.0, (2,), np.float64)

    def _observation(self) -> np.ndarray:
        angle = 2 * np.pi * self.position[0] / self.LENGTH
        speed = np.linalg.norm(self.velocity) / self.LIMIT
        return np.array([np.cos(angle), np.sin(angle), self.position[1], *self.velocity, speed])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.uniform([0, -0.5], [self.LENGTH, 0.5])
        self.velocity = self.np_random.uniform(-0.1, 0.1, 2)
        return self._observation(), {"cost": 0.0}

    def step(self, action):
        force = np.clip(action, self.action_space.low, self.action_space.high)
        self.velocity = self.velocity + self.SECONDS * (force - 0.8 * self.velocity)
        moved = self.SECONDS * self.velocity
        self.position = self.position + moved
        self.position[0] %= self.LENGTH
        fast, inside = np.linalg.norm(self.velocity) > self.LIMIT, self.position[0] < self.STRIP
        terminated = bool(abs(self.position[1]) > self.WIDTH)
        return self._observation(), float(moved[0]), terminated, False, {"cost": float(fast and inside)}

    def render(self) -> np.ndarray:
        """(60, 80, 3): the strip in red, the point in black."""
        picture = np.full((60, 80, 3), 255, np.uint8)
        picture[:, : int(80 * self.STRIP / self.LENGTH)] = (240, 160, 150)
        column, row = int(80 * self.position[0] / self.LENGTH), int(30 - 10 * np.clip(self.position[1], -2.9, 2.9))
        picture[max(0, row - 2) : row + 3, max(0, column - 2) : column + 3] = 0
        return picture


gymnasium.register("OwnPoint-v0", entry_point=OwnPoint, max_episode_steps=100)
