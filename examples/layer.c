/* What hardware must do for one layer: start each register from its preload, add the products in ACC_BITS bits that wrap
 * around, subtract the preload, rescale.
 *
 *     python layer_header.py runs/p12 layer1.0.conv1 > layer.h
 *     gcc -std=c99 -O2 -ffp-contract=off -I. layer.c -o layer
 *     ./layer < codes.txt
 *
 * layer.h (written by layer_header.py) holds ACC_BITS, CHANNELS, TAPS and the tables. codes.txt holds the input codes of
 * one output position after the other, TAPS integers for each: for a convolution those under its window, channel by
 * channel, row by row, and 0 where it is padded. For every position a line of the channels' sums and a line of outputs
 * is printed. Outputs are floats as in the exported files; -ffp-contract=off keeps the compiler from rounding otherwise.
 */
#include <stdint.h>
#include <stdio.h>

#include "layer.h"

/* The low ACC_BITS bits, read in two's complement: what a register of that width keeps. */
static int64_t keep(int64_t value)
{
    const uint64_t sign = (uint64_t)1 << (ACC_BITS - 1);
    const uint64_t low = (uint64_t)value & (2 * sign - 1);
    return (int64_t)(low ^ sign) - (int64_t)sign;
}

/* The sum of products of one channel. The certificate says that the register ends where exact arithmetic would, for any
 * codes; so the exact sum, which may be one bit wider, is left when the preload is subtracted. */
static int64_t accumulate(const int8_t weights[TAPS], const int32_t codes[TAPS], int64_t preload)
{
    int64_t accumulator = keep(preload);
    for (int tap = 0; tap < TAPS; tap++)
        accumulator = keep(accumulator + weights[tap] * codes[tap]);
    return accumulator - preload;
}

int main(void)
{
    int32_t codes[TAPS];
    int64_t sums[CHANNELS];
    for (;;) {
        for (int tap = 0; tap < TAPS; tap++)
            if (scanf("%d", &codes[tap]) != 1)
                return 0;
        for (int c = 0; c < CHANNELS; c++)
            printf("%lld ", (long long)(sums[c] = accumulate(WEIGHTS[c], codes, PRELOAD[c])));
        printf("\n");
        for (int c = 0; c < CHANNELS; c++) {
            const float scaled = (float)sums[c] * RESCALE[c];
            printf("%.9g ", scaled + SHIFT[c]);
        }
        printf("\n");
    }
}
