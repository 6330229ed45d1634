// What codes of 4 bits stand for. The 16 Lloyd-Max levels of N(0, 1) and the edges between them:
// kvsuite/kernels/lloyd.py; E2M1: kvsuite/kernels/fp4.py.
#pragma once

alignas(64) static constexpr float LEVELS_4[16] = {
  -2.73258948f, -2.06901717f, -1.6180464f, -1.25623119f, -0.942340434f, -0.656759143f, -0.388048291f, -0.128395036f,
  0.128395036f, 0.388048291f, 0.656759143f, 0.942340434f, 1.25623119f, 1.6180464f, 2.06901717f, 2.73258948f};
static constexpr float EDGES_4[15] = {
  -2.40080333f, -1.84353185f, -1.4371388f, -1.09928584f, -0.799549758f, -0.522403717f, -0.258221656f, 0.f,
  0.258221656f, 0.522403717f, 0.799549758f, 1.09928584f, 1.4371388f, 1.84353185f, 2.40080333f};
alignas(64) static constexpr float E2M1_NUMBERS[16] = {0.f, 0.5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f,
                                                      -0.f, -0.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};
