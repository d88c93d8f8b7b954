// Pictures of audio, drawn from the very samples that are heard.

const WINDOW = 2048;
const COLUMNS = 640;
const ROWS = 160;
const LOWEST_HZ = 40;
const HIGHEST_HZ = 20000;
const RANGE_DB = 80;
const LARGEST_DIFFERENCE_DB = 12;
const STEREO_RANGE_DB = 60;
const STEREO_COLUMNS = 160;
const BLUR = 2;
// Pixels of the pictures of curves; the page scales them.
const CURVE_WIDTH = 960;
const WAVEFORM_HEIGHT = 200;
const STEREO_HEIGHT = 300;
// Level to colour; each lighter than the one before.
const HEAT = [
  [9, 9, 20], [45, 22, 95], [112, 30, 118], [182, 54, 102], [236, 100, 66], [253, 172, 60], [252, 250, 205],
];

const COSINES = Float64Array.from({ length: WINDOW / 2 }, (_, k) => Math.cos((2 * Math.PI * k) / WINDOW));
const SINES = Float64Array.from({ length: WINDOW / 2 }, (_, k) => -Math.sin((2 * Math.PI * k) / WINDOW));
const HANN = Float64Array.from({ length: WINDOW }, (_, n) => 0.5 - 0.5 * Math.cos((2 * Math.PI * n) / WINDOW));
const REVERSED = Uint16Array.from({ length: WINDOW }, (_, n) => {
  let reversed = 0;
  for (let bit = 1, rest = n; bit < WINDOW; bit *= 2, rest >>= 1) reversed = reversed * 2 + (rest & 1);
  return reversed;
});

// Of numbers in bit-reversed order, in place.
function transform(real, imaginary) {
  for (let size = 2; size <= WINDOW; size *= 2) {
    const half = size / 2;
    const stride = WINDOW / size;
    for (let start = 0; start < WINDOW; start += size) {
      for (let k = 0; k < half; k += 1) {
        const low = start + k;
        const high = low + half;
        const cosine = COSINES[k * stride];
        const sine = SINES[k * stride];
        const x = real[high] * cosine - imaginary[high] * sine;
        const y = real[high] * sine + imaginary[high] * cosine;
        real[high] = real[low] - x;
        imaginary[high] = imaginary[low] - y;
        real[low] += x;
        imaginary[low] += y;
      }
    }
  }
}

// Mean powers of both channels over logarithmic bands, [ROWS * COLUMNS], the highest band first; a
// full-scale sine has 1 in its bin.
function spectrogram([left, right = left], rate) {
  const top = Math.min(HIGHEST_HZ, rate / 2);
  const edge = (row) => ((LOWEST_HZ * (top / LOWEST_HZ) ** (row / ROWS)) / rate) * WINDOW;
  const picture = new Float32Array(ROWS * COLUMNS);
  const real = new Float64Array(WINDOW);
  const imaginary = new Float64Array(WINDOW);
  const power = new Float64Array(WINDOW / 2 + 1);
  for (let column = 0; column < COLUMNS; column += 1) {
    const first = Math.round(((column + 0.5) / COLUMNS) * left.length) - WINDOW / 2;
    for (let n = 0; n < WINDOW; n += 1) {
      const sample = first + n;
      const inside = sample >= 0 && sample < left.length;
      real[REVERSED[n]] = inside ? left[sample] * HANN[n] : 0;
      imaginary[REVERSED[n]] = inside ? right[sample] * HANN[n] : 0;
    }
    transform(real, imaginary);
    for (let k = 0; k < power.length; k += 1) {
      const mirrored = (WINDOW - k) % WINDOW;
      // One complex transform of two real signals: the sum of their powers is that of the two halves.
      const both = real[k] ** 2 + imaginary[k] ** 2 + real[mirrored] ** 2 + imaginary[mirrored] ** 2;
      power[k] = both / 4 / (WINDOW / 4) ** 2;
    }
    for (let row = 0; row < ROWS; row += 1) {
      picture[(ROWS - 1 - row) * COLUMNS + column] = bandPower(power, edge(row), edge(row + 1));
    }
  }
  return picture;
}

function bandPower(power, low, high) {
  if (high - low < 1) {
    const centre = (low + high) / 2;
    const bin = Math.min(Math.floor(centre), power.length - 2);
    return power[bin] + (power[bin + 1] - power[bin]) * (centre - bin);
  }
  let sum = 0;
  const first = Math.round(low);
  const stop = Math.max(first + 1, Math.min(Math.round(high), power.length));
  for (let bin = first; bin < stop; bin += 1) sum += power[bin];
  return sum / (stop - first);
}

function decibels(power) {
  return 10 * Math.log10(power + 1e-12);
}

// Means over neighbours: single bins of two noises differ where their levels do not.
function blurred(picture) {
  const across = new Float32Array(picture.length);
  const result = new Float32Array(picture.length);
  const mean = (from, to, count, step, lines, lineStep) => {
    for (let line = 0; line < lines; line += 1) {
      for (let index = 0; index < count; index += 1) {
        const first = Math.max(0, index - BLUR);
        const last = Math.min(count - 1, index + BLUR);
        let sum = 0;
        for (let k = first; k <= last; k += 1) sum += from[line * lineStep + k * step];
        to[line * lineStep + index * step] = sum / (last - first + 1);
      }
    }
  };
  mean(picture, across, COLUMNS, 1, ROWS, COLUMNS);
  mean(across, result, ROWS, COLUMNS, COLUMNS, 1);
  return result;
}

// Colours are a function of the index in the picture.
function paint(canvas, colour) {
  canvas.width = COLUMNS;
  canvas.height = ROWS;
  const context = canvas.getContext("2d");
  const image = context.createImageData(COLUMNS, ROWS);
  for (let index = 0; index < COLUMNS * ROWS; index += 1) {
    const [red, green, blue] = colour(index);
    image.data.set([red, green, blue, 255], 4 * index);
  }
  context.putImageData(image, 0, 0);
}

function mixed(from, to, part) {
  return from.map((value, index) => value + (to[index] - value) * part);
}

const SHADES = Array.from({ length: 256 }, (_, index) => {
  const position = (index / 255) * (HEAT.length - 1);
  const lower = Math.min(Math.floor(position), HEAT.length - 2);
  return mixed(HEAT[lower], HEAT[lower + 1], position - lower);
});

function paintLevels(canvas, picture, topDb) {
  paint(canvas, (index) => {
    const level = 1 + (decibels(picture[index]) - topDb) / RANGE_DB;
    return SHADES[Math.round(255 * Math.min(1, Math.max(0, level)))];
  });
}

// Louder and quieter than the original; pale where both are nearly inaudible.
function paintDifference(canvas, picture, original, topDb, [quieter, equal, louder]) {
  const ours = blurred(picture);
  const theirs = blurred(original);
  paint(canvas, (index) => {
    const [a, b] = [decibels(ours[index]), decibels(theirs[index])];
    const audible = Math.min(1, Math.max(0, (Math.max(a, b) - topDb + RANGE_DB) / 20));
    const difference = Math.min(1, Math.abs(a - b) / LARGEST_DIFFERENCE_DB);
    return mixed(equal, a < b ? quieter : louder, audible * difference);
  });
}

function surface(canvas, height) {
  canvas.width = CURVE_WIDTH;
  canvas.height = height;
  return { context: canvas.getContext("2d"), width: CURVE_WIDTH, height };
}

// The extent of all channels, and inside it their root mean square.
function paintWaveform(canvas, channels, gain, colour) {
  const { context, width, height } = surface(canvas, WAVEFORM_HEIGHT);
  const middle = height / 2;
  context.fillStyle = colour;
  for (let x = 0; x < width; x += 1) {
    const first = Math.floor((x / width) * channels[0].length);
    const stop = Math.max(first + 1, Math.floor(((x + 1) / width) * channels[0].length));
    let [low, high, squares] = [0, 0, 0];
    for (const samples of channels) {
      for (let n = first; n < stop; n += 1) {
        low = Math.min(low, samples[n]);
        high = Math.max(high, samples[n]);
        squares += samples[n] ** 2;
      }
    }
    const mean = Math.sqrt(squares / (channels.length * (stop - first)));
    context.globalAlpha = 0.45;
    bar(context, x, middle - high * gain * middle, middle - low * gain * middle);
    context.globalAlpha = 1;
    bar(context, x, middle - mean * gain * middle, middle + mean * gain * middle);
  }
}

function bar(context, x, top, bottom) {
  context.fillRect(x, top, 1, Math.max(1, bottom - top));
}

// Energy of mid (area) and side (line) over time, and below how alike left and right are.
function paintStereo(canvas, [left, right = left], topDb, colour, pale) {
  const { context, width, height } = surface(canvas, STEREO_HEIGHT);
  const upper = height * 0.62;
  const centre = height * 0.82;
  const reach = height * 0.16;
  const side = [];
  context.fillStyle = colour;
  for (let column = 0; column < STEREO_COLUMNS; column += 1) {
    const [mid, apart, alike] = stereoEnergies(left, right, column);
    const step = width / STEREO_COLUMNS;
    const x = column * step;
    const y = (power) => upper * Math.min(1, Math.max(0, (topDb - decibels(power)) / STEREO_RANGE_DB));
    context.globalAlpha = 0.35;
    context.fillRect(x, y(mid), step, upper - y(mid));
    side.push([x + step / 2, y(apart)]);
    context.globalAlpha = 0.9;
    context.fillRect(x, alike > 0 ? centre - alike * reach : centre, step, Math.max(2, Math.abs(alike) * reach));
  }
  context.globalAlpha = 1;
  context.strokeStyle = colour;
  context.lineWidth = 4;
  context.beginPath();
  for (const [x, y] of side) context.lineTo(x, Math.min(y, upper - 2));
  context.stroke();
  context.fillStyle = pale;
  context.fillRect(0, upper, width, 2);
  context.fillRect(0, centre - 1, width, 2);
}

function stereoEnergies(left, right, column) {
  const first = Math.floor((column / STEREO_COLUMNS) * left.length);
  const stop = Math.max(first + 1, Math.floor(((column + 1) / STEREO_COLUMNS) * left.length));
  let [lefts, rights, products] = [1e-12, 1e-12, 0];
  for (let n = first; n < stop; n += 1) {
    lefts += left[n] ** 2;
    rights += right[n] ** 2;
    products += left[n] * right[n];
  }
  const count = stop - first;
  const mid = Math.max(0, lefts + rights + 2 * products) / (4 * count);
  const side = Math.max(0, lefts + rights - 2 * products) / (4 * count);
  return [mid, side, products / Math.sqrt(lefts * rights)];
}
