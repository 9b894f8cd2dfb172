// From tensors and a convolution's window to a problem made of outer products.
#pragma once

#include "common.h"
#include "routines.h"

namespace fastdg {

// g = sum_t delta[t] (x) a[t] over the rows of a [N, T, I], or over the patches of a padded convolution
// input [N, C, *S] that window = [*kernel, *stride, *dilation] describes. The patches are the left factor;
// of two matrices the one that fills vector lanes better is the right one; of two that fill them alike delta, or with
// `narrow_left` the wider one: for who reads the left one again for each panel of the right. `flat`: whether both
// may be [N, *], of one row for each sample.
Outer outer_problem(const Tensor& a, const Tensor& delta, const Window& window, bool narrow_left = false,
                    bool flat = false);

// The factors without the window where positions are few: patches written out, [N, T, I], are small beside the
// moments, whose routines for few positions take no window.
struct __attribute__((visibility("hidden"))) Factors {
  Tensor a, delta;
  Window window;
};
Factors without_window(const Tensor& a, const Tensor& delta, const Window& window);

// Sets `to`, of a's sizes, to the sum of its written patches' gradients.
void add_patches(Tensor to, const Tensor& rows, const Window& window);

// Where the derivative of the problem by its factors goes.
Gradient gradient_of(const Outer& p, const Tensor& grad_a, const Tensor& grad_delta,
                     const Window& window);

}  // namespace fastdg
