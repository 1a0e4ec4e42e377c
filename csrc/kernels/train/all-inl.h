// The training kernels of one instruction set level, and their table.
#pragma once

#include "dense-inl.h"
#include "depthwise-inl.h"
#include "joins-inl.h"
#include "mean-inl.h"
#include "norm-inl.h"
#include "pointwise-inl.h"
#include "pool-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

TrainTable train_table() {
  TrainTable t{};
  t.norm_forward = {norm_forward_prepare, norm_forward_run};
  t.norm_backward = {norm_backward_prepare, norm_backward_run};
  t.merge_weights = {merge_weights_prepare, merge_weights_run};
  t.pack_matrix = {pack_matrix_prepare, pack_matrix_run};
  t.pack_taps = {pack_taps_prepare, pack_taps_run};
  t.pointwise = {train_pointwise_prepare, train_pointwise_run};
  t.pointwise_grad = {pointwise_grad_prepare, pointwise_grad_run};
  t.depthwise = {train_depthwise_prepare, train_depthwise_run};
  t.depthwise_grad = {depthwise_grad_prepare, depthwise_grad_run};
  t.dense_grad = {dense_grad_prepare, dense_grad_run};
  t.moments = {moments_prepare, moments_run};
  t.join = {join_prepare, join_run};
  t.finish = {finish_prepare, finish_run};
  t.gather = {gather_prepare, gather_run};
  t.gather_grad = {gather_grad_prepare, gather_grad_run};
  t.pool = {train_pool_prepare, train_pool_run};
  t.pool_grad = {pool_grad_prepare, pool_grad_run};
  t.mean = {mean_prepare, mean_run};
  t.mean_grad = {mean_grad_prepare, mean_grad_run};
  return t;
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
