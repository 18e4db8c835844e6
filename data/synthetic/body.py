"""The walking skeleton of a person."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Limb:
    """Three joints of an arm or a leg in body coordinates; `side` is +1 for the wearer's left, -1 for the right."""

    side: int
    root: np.ndarray
    middle: np.ndarray
    tip: np.ndarray


@dataclass(frozen=True)
class Pose:
    """A moment of walking: two legs, two arms, and the height of the hips above their place in a straight stand."""

    legs: tuple[Limb, Limb]
    arms: tuple[Limb, Limb]
    sink: float


def walk(phase: float, stride: float, build: float, arm_swing: float, elbow: float) -> Pose:
    """The pose at `phase` (radians) of a step cycle; `stride` is the largest angle of the thigh, in radians."""
    legs, arms, lowest = [], [], 1.0
    for side in (1, -1):
        swing = math.sin(phase + (0 if side == 1 else math.pi))
        lift = max(0.0, math.cos(phase + (0 if side == 1 else math.pi)))
        thigh = stride * swing
        shin = thigh - (0.1 + 1.5 * stride * lift + 0.25 * stride * max(0.0, -swing))
        hip = np.array([side * 0.046 * build, 0.51, 0.0])
        knee = hip + 0.235 * np.array([0.03 * side, -math.cos(thigh), math.sin(thigh)])
        ankle = knee + 0.225 * np.array([0.0, -math.cos(shin), math.sin(shin)])
        legs.append(Limb(side, hip, knee, ankle))
        lowest = min(lowest, ankle[1])

        upper = -arm_swing * swing
        lower = upper + elbow
        shoulder = np.array([side * 0.098 * build, 0.795, 0.0])
        joint = shoulder + 0.165 * np.array([0.16 * side, -math.cos(upper), math.sin(upper)])
        wrist = joint + 0.145 * np.array([0.02 * side, -math.cos(lower), math.sin(lower)])
        arms.append(Limb(side, shoulder, joint, wrist))
    drop = np.array([0.0, lowest - 0.04, 0.0])
    moved = [Limb(limb.side, limb.root - drop, limb.middle - drop, limb.tip - drop) for limb in (*legs, *arms)]
    return Pose(legs=tuple(moved[:2]), arms=tuple(moved[2:]), sink=float(drop[1]))
