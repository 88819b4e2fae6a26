"""Where the rain of a year goes: a small model of a garden's water tank."""

from dataclasses import dataclass

LITRES_PER_CUBIC_METRE = 1000


@dataclass
class Tank:
    """A tank below a roof; what does not fit flows away."""

    capacity: float  # litres
    level: float = 0.0
    overflow: float = 0.0

    def fill(self, rain_mm: float, roof_m2: float) -> None:
        """Adds the rain of one day: a millimetre on a square metre is a litre."""
        self.level += rain_mm * roof_m2
        if self.level > self.capacity:
            self.overflow += self.level - self.capacity
            self.level = self.capacity

    def draw(self, litres: float) -> float:
        """Takes what is wanted, or what is there; how much was missing."""
        taken = min(litres, self.level)
        self.level -= taken
        return litres - taken


def simulate(tank: Tank, rain: list[float], roof_m2: float = 40.0, need: float = 60.0) -> dict[str, float]:
    missing = 0.0
    for day, millimetres in enumerate(rain):
        tank.fill(millimetres, roof_m2)
        if millimetres < 1.0 and 90 <= day % 365 < 270:  # dry, and something grows
            missing += tank.draw(need)
    return {"missing": missing, "overflow": tank.overflow, "left": tank.level}


if __name__ == "__main__":
    year = [0.0, 0.0, 6.5, 0.0, 12.0, 0.2, 0.0] * 52
    for name, litres in simulate(Tank(capacity=3 * LITRES_PER_CUBIC_METRE), year).items():
        print(f"{name:>10}: {litres:8.1f} l")
