// Plays every signal of an excerpt at once, in step, and lets one of them be heard.

const FADE_SECONDS = 0.012;
const KEPT_EXCERPTS = 3;

function decode(row, column, rate) {
  const text = atob(document.getElementById(`audio-${row}-${column}`).textContent);
  const bytes = new Uint8Array(text.length);
  for (let index = 0; index < text.length; index += 1) bytes[index] = text.charCodeAt(index);
  // At the file's own rate nothing is resampled; the context of the speakers may have another.
  return new OfflineAudioContext(2, 1, rate).decodeAudioData(bytes.buffer);
}

// Decoded audio of the excerpts that were used last; all of a large report would fill a phone.
class Buffers {
  constructor(excerpts) {
    this.excerpts = excerpts;
    this.kept = new Map();
  }

  get(row) {
    const { rate, signals } = this.excerpts[row];
    const promise = this.kept.get(row) ?? Promise.all(signals.map((_, column) => decode(row, column, rate)));
    this.kept.delete(row);
    this.kept.set(row, promise);
    if (this.kept.size > KEPT_EXCERPTS) this.kept.delete(this.kept.keys().next().value);
    return promise;
  }
}

// A gain that moves without clicks. Browsers differ in what they report as its value under way.
class Fader {
  constructor(context, destination, value) {
    this.node = context.createGain();
    this.node.gain.value = value;
    this.node.connect(destination);
    this.from = value;
    this.to = value;
    this.since = 0;
  }

  at(time) {
    const done = Math.min(1, Math.max(0, (time - this.since) / FADE_SECONDS));
    return this.from + (this.to - this.from) * done;
  }

  fade(value, time) {
    const from = this.at(time);
    const { gain } = this.node;
    gain.cancelScheduledValues(time);
    gain.setValueAtTime(from, time);
    gain.linearRampToValueAtTime(value, time + FADE_SECONDS);
    Object.assign(this, { from, to: value, since: time });
  }
}

class Player extends EventTarget {
  constructor(excerpts) {
    super();
    this.excerpts = excerpts;
    this.buffers = new Buffers(excerpts);
    this.contexts = new Map();
    this.row = 0;
    this.column = 0;
    this.blind = false;
    this.matched = true;
    this.loop = true;
    this.offset = 0;
    this.sounding = null;
    this.request = 0;
    this.wanted = false;
  }

  get duration() {
    return this.excerpts[this.row].seconds;
  }

  get playing() {
    return this.sounding !== null;
  }

  get position() {
    if (!this.sounding) return this.offset;
    const { context, startedAt } = this.sounding;
    return (this.offset + Math.max(0, context.currentTime - startedAt)) % this.duration;
  }

  async play() {
    if (this.sounding) return;
    const request = (this.request += 1);
    this.wanted = true;
    // Within the click or key, or the browser keeps it silent.
    const context = this.context(this.excerpts[this.row].rate);
    const running = context.resume();
    const [buffers] = await Promise.all([this.buffers.get(this.row), running]);
    if (request !== this.request) return;
    this.start(context, buffers);
    this.changed();
  }

  pause() {
    this.request += 1;
    this.wanted = false;
    this.offset = this.position;
    this.stop();
    this.changed();
  }

  toggle() {
    return this.wanted ? this.pause() : this.play();
  }

  // Another excerpt from its beginning, playing on if one was.
  select(row) {
    if (row === this.row) return;
    const playing = this.wanted;
    this.pause();
    this.row = row;
    this.offset = 0;
    this.changed();
    if (playing) this.play();
  }

  seek(seconds) {
    const playing = this.sounding;
    this.stop();
    this.offset = Math.min(Math.max(0, seconds), this.duration - 0.001);
    if (playing) this.start(playing.context, playing.buffers);
    this.changed();
  }

  // Which signal is heard; `blind` keeps it from being shown.
  choose(column, blind = false) {
    this.column = column;
    this.blind = blind;
    this.level();
    this.changed();
  }

  match(matched) {
    this.matched = matched;
    this.level();
    this.changed();
  }

  repeat(loop) {
    this.loop = loop;
    if (this.sounding) for (const source of this.sounding.sources) source.loop = loop;
    this.changed();
  }

  gain(column) {
    if (column !== this.column) return 0;
    const signal = this.excerpts[this.row].signals[column];
    return this.matched ? signal.matched : signal.plain;
  }

  level() {
    if (!this.sounding) return;
    const { context, voices } = this.sounding;
    voices.forEach((voice, column) => voice.fade(this.gain(column), context.currentTime));
  }

  start(context, buffers) {
    const group = new Fader(context, context.destination, 0);
    const voices = buffers.map((_, column) => new Fader(context, group.node, this.gain(column)));
    const sources = buffers.map((buffer, column) => {
      const source = new AudioBufferSourceNode(context, { buffer, loop: this.loop });
      source.connect(voices[column].node);
      return source;
    });
    // A little ahead, so that all begin with the same sample.
    const startedAt = context.currentTime + 0.02;
    for (const source of sources) source.start(startedAt, this.offset);
    group.fade(1, startedAt);
    const sounding = { context, buffers, group, voices, sources, startedAt };
    this.sounding = sounding;
    sources[0].onended = () => {
      if (this.sounding !== sounding) return;
      this.stop();
      this.offset = 0;
      this.wanted = false;
      this.changed();
    };
  }

  stop() {
    if (!this.sounding) return;
    const { context, group, sources } = this.sounding;
    const now = context.currentTime;
    group.fade(0, now);
    for (const source of sources) source.stop(now + FADE_SECONDS);
    this.sounding = null;
  }

  // One for each rate: a browser resamples its whole output better than single sources.
  context(rate) {
    if (!this.contexts.has(rate)) {
      let context;
      try {
        context = new AudioContext({ sampleRate: rate, latencyHint: "interactive" });
      } catch {
        context = new AudioContext();
      }
      this.contexts.set(rate, context);
    }
    return this.contexts.get(rate);
  }

  changed() {
    this.dispatchEvent(new Event("change"));
  }
}
