// A recurrent model in RTNeural's compile-time API, sample by sample, for compare.py.
//
//   rtneural_run MODEL FILE.json
//
// MODEL: lstm8, gru8, ... (one layer of that size over single samples; FILE is a state_dict whose
// names begin with "layer."), or one of RTNeural's published models by its file's name. Orders come
// in as lines: "outputs N" and N samples -> every output, in a line; "time SECONDS" -> nanoseconds
// per sample. The first line out says what was compiled.
#include <RTNeural/RTNeural.h>

#include <chrono>
#include <cmath>
#include <fstream>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

namespace {

template <int in, int out>
using Lstm = RTNeural::LSTMLayerT<float, in, out>;
template <int in, int out>
using Gru = RTNeural::GRULayerT<float, in, out>;
template <int in, int out>
using Dense = RTNeural::DenseT<float, in, out>;

#if RTNEURAL_USE_XSIMD
constexpr const char* kBackend = "xsimd";
#elif RTNEURAL_USE_EIGEN
constexpr const char* kBackend = "eigen";
#else
constexpr const char* kBackend = "stl";
#endif

template <class Model>
int serve(Model& model) {
  using Clock = std::chrono::steady_clock;
  std::cout << kBackend << ' ' << RTNEURAL_DEFAULT_ALIGNMENT << std::endl;
  std::vector<float> signal(4096);
  for (size_t i = 0; i < signal.size(); ++i) signal[i] = 0.5f * std::sin(0.1f * float(i));
  std::cout.precision(9);
  std::string order;
  while (std::cin >> order) {
    model.reset();
    if (order == "outputs") {
      int count;
      std::cin >> count;
      for (int i = 0; i < count; ++i) {
        float x;
        std::cin >> x;
        model.forward(&x);
        for (int j = 0; j < Model::output_size; ++j) std::cout << model.getOutputs()[j] << ' ';
      }
      std::cout << std::endl;
    } else {
      double wanted, passed = 0;
      std::cin >> wanted;
      long samples = 0;
      volatile float sink = 0;  // or the compiler may leave out what nobody reads
      const auto begin = Clock::now();
      while (passed < wanted) {
        float sum = 0;
        for (const float& x : signal) sum += model.forward(&x);
        sink = sink + sum;
        samples += long(signal.size());
        passed = std::chrono::duration<double>(Clock::now() - begin).count();
      }
      std::cout << passed / double(samples) * 1e9 << std::endl;
    }
  }
  return 0;
}

template <class... Layers>
using Model = RTNeural::ModelT<float, 1, 1, Layers...>;

nlohmann::json read(const std::string& file) {
  std::ifstream stream(file);
  nlohmann::json json;
  stream >> json;
  return json;
}

// Models of fixed size are large: they do not belong on the stack.
template <int size>
int layer(const std::string& cell, const std::string& file) {
  const auto json = read(file);
  if (cell == "lstm") {
    auto model = std::make_unique<RTNeural::ModelT<float, 1, size, Lstm<1, size>>>();
    RTNeural::torch_helpers::loadLSTM<float>(json, "layer.", model->template get<0>());
    return serve(*model);
  }
  auto model = std::make_unique<RTNeural::ModelT<float, 1, size, Gru<1, size>>>();
  RTNeural::torch_helpers::loadGRU<float>(json, "layer.", model->template get<0>());
  return serve(*model);
}

template <class Model>
int keras(const std::string& file) {
  auto model = std::make_unique<Model>();
  std::ifstream stream(file);
  model->parseJson(stream);
  return serve(*model);
}

int lstm_torch(const std::string& file) {
  auto model =
      std::make_unique<Model<Lstm<1, 8>, Lstm<8, 8>, Lstm<8, 8>, Lstm<8, 8>, Dense<8, 1>>>();
  const auto json = read(file);
  RTNeural::torch_helpers::loadLSTM<float>(json, "lstm.", model->get<0>());
  RTNeural::torch_helpers::loadLSTM<float>(json, "lstm2.", model->get<1>(), true, 0);
  RTNeural::torch_helpers::loadLSTM<float>(json, "lstm2.", model->get<2>(), true, 1);
  RTNeural::torch_helpers::loadLSTM<float>(json, "lstm2.", model->get<3>(), true, 2);
  RTNeural::torch_helpers::loadDense<float>(json, "dense.", model->get<4>());
  return serve(*model);
}

int gru_torch(const std::string& file) {
  auto model = std::make_unique<Model<Gru<1, 8>, Gru<8, 8>, Gru<8, 8>, Gru<8, 8>, Dense<8, 1>>>();
  const auto json = read(file);
  RTNeural::torch_helpers::loadGRU<float>(json, "gru.", model->get<0>());
  RTNeural::torch_helpers::loadGRU<float>(json, "gru2.", model->get<1>(), true, 0);
  RTNeural::torch_helpers::loadGRU<float>(json, "gru2.", model->get<2>(), true, 1);
  RTNeural::torch_helpers::loadGRU<float>(json, "gru2.", model->get<3>(), true, 2);
  RTNeural::torch_helpers::loadDense<float>(json, "dense.", model->get<4>());
  return serve(*model);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: rtneural_run MODEL FILE.json" << std::endl;
    return 2;
  }
  const std::string name = argv[1], file = argv[2];
  using Tanh = RTNeural::TanhActivationT<float, 8>;
  using Sigmoid = RTNeural::SigmoidActivationT<float, 8>;
  if (name == "lstm_1d") return keras<Model<Lstm<1, 8>, Dense<8, 1>>>(file);
  if (name == "gru_1d") return keras<Model<Gru<1, 8>, Dense<8, 8>, Sigmoid, Dense<8, 1>>>(file);
  if (name == "lstm") return keras<Model<Dense<1, 8>, Tanh, Lstm<8, 8>, Dense<8, 1>>>(file);
  if (name == "gru") {
    return keras<Model<Dense<1, 8>, Tanh, Gru<8, 8>, Dense<8, 8>, Sigmoid, Dense<8, 1>>>(file);
  }
  if (name == "lstm_torch") return lstm_torch(file);
  if (name == "gru_torch") return gru_torch(file);
  const size_t digits = name.find_first_of("0123456789");
  const std::string cell = name.substr(0, digits);
  const int size = digits == std::string::npos ? 0 : std::stoi(name.substr(digits));
  if (cell == "lstm" || cell == "gru") {
    switch (size) {
      case 8:
        return layer<8>(cell, file);
      case 16:
        return layer<16>(cell, file);
      case 20:
        return layer<20>(cell, file);
      case 24:
        return layer<24>(cell, file);
      case 32:
        return layer<32>(cell, file);
      case 40:
        return layer<40>(cell, file);
      case 64:
        return layer<64>(cell, file);
    }
  }
  std::cerr << "no such model: " << name << std::endl;
  return 2;
}
