// All device code, compiled once per architecture (compile.py); kernel_names.py says which
// instances.
#include "../cells/gru.h"
#include "../cells/gru_before.h"
#include "../cells/gru_options.h"
#include "../cells/leaky.h"
#include "../cells/lstm.h"
#include "../cells/lstm_variants.h"
#include "../cells/normed.h"
#include "../cells/rnn.h"
#include "../cells/rnn_options.h"
#include "backward.h"
#include "forward.h"
#include "normed.h"
