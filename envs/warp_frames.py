"""The contact of a plane and a capsule with C MuJoCo's frame, as a Warp function (physics_warp.py puts it in place).

MuJoCo Warp's own (mujoco-mjx 3.17, collision_primitive_core.plane_capsule) compares with 0.5 the length of the axis *after* its
part along the normal is gone, so within 30 degrees of the normal it drops the axis for one of the world's. C MuJoCo's
mju_makeFrame compares the axis itself, whose length is 1, and so always keeps its direction.
"""

import warp as wp
from mujoco.mjx.third_party.mujoco_warp._src.collision_primitive_core import mat23f, plane_sphere


@wp.func
def plane_capsule(
    plane_normal: wp.vec3,
    plane_pos: wp.vec3,
    capsule_pos: wp.vec3,
    capsule_axis: wp.vec3,
    capsule_radius: float,
    capsule_half_length: float,
):
    n = plane_normal
    along = capsule_axis - n * wp.dot(n, capsule_axis)
    length = wp.length(along)
    b = wp.vec3(1.0, 0.0, 0.0)
    if length > 1.0e-6:
        b = along / length
    elif wp.abs(n[0]) > 0.5:
        b = wp.vec3(0.0, 1.0, 0.0)
    c = wp.cross(n, b)
    frame = wp.mat33(n[0], n[1], n[2], b[0], b[1], b[2], c[0], c[1], c[2])
    segment = capsule_axis * capsule_half_length
    dist1, pos1 = plane_sphere(n, plane_pos, capsule_pos + segment, capsule_radius)
    dist2, pos2 = plane_sphere(n, plane_pos, capsule_pos - segment, capsule_radius)
    return wp.vec2(dist1, dist2), mat23f(pos1[0], pos1[1], pos1[2], pos2[0], pos2[1], pos2[2]), frame
