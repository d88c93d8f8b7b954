// The blind test: is X the same as A, or as B?

// How often a guesser gets at least so many right: the sum of the binomial distribution's tail.
function binomialTail(right, trials) {
  let ways = 1;
  let sum = 0;
  for (let count = trials; count >= right; count -= 1) {
    sum += ways;
    ways = (ways * count) / (trials - count + 1);
  }
  return sum / 2 ** trials;
}

function coin() {
  return (crypto.getRandomValues(new Uint8Array(1))[0] & 1) === 1;
}

class AbxTest {
  constructor(trials) {
    this.trials = trials;
    this.answers = [];
    this.isA = coin();
  }

  get count() {
    return this.answers.length;
  }

  get right() {
    return this.answers.filter(({ isA, saidA }) => isA === saidA).length;
  }

  get finished() {
    return this.count >= this.trials;
  }

  answer(saidA) {
    this.answers.push({ isA: this.isA, saidA });
    this.isA = coin();
  }
}

class AbxDialog {
  constructor(player, excerptNames, signalNames) {
    this.player = player;
    this.dialog = document.getElementById("abx");
    this.setup = document.getElementById("abx-setup");
    this.trial = document.getElementById("abx-trial");
    this.result = document.getElementById("abx-result");
    this.status = document.getElementById("abx-status");
    this.field = (name) => this.setup.elements[name];
    fillChoice(this.field("excerpt"), excerptNames);
    fillChoice(this.field("a"), signalNames);
    fillChoice(this.field("b"), signalNames);
    this.setup.addEventListener("submit", (event) => {
      event.preventDefault();
      this.begin();
    });
    for (const button of this.trial.querySelectorAll("[data-hear]")) {
      button.addEventListener("click", () => this.hear(button.dataset.hear));
    }
    for (const button of this.trial.querySelectorAll("[data-answer]")) {
      button.addEventListener("click", () => this.answer(button.dataset.answer === "a"));
    }
    document.getElementById("abx-play").addEventListener("click", () => player.toggle());
    document.getElementById("abx-stop").addEventListener("click", () => this.finish());
    document.getElementById("abx-again").addEventListener("click", () => this.show("setup"));
    document.getElementById("abx-close").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener("close", () => this.closed());
    player.addEventListener("change", () => this.update());
  }

  get open() {
    return this.dialog.open;
  }

  show(part) {
    for (const name of ["setup", "trial", "result"]) this[name].hidden = name !== part;
    this.status.textContent = "";
  }

  // With the excerpt and the system that are being listened to.
  start() {
    const { row, column } = this.player;
    this.before = { column, matched: this.player.matched, loop: this.player.loop };
    this.field("excerpt").value = row;
    this.field("a").value = 0;
    this.field("b").value = column || 1;
    this.show("setup");
    this.dialog.showModal();
  }

  begin() {
    this.choice = { a: Number(this.field("a").value), b: Number(this.field("b").value) };
    if (this.choice.a === this.choice.b) {
      this.status.textContent = "Choose two different signals.";
      return;
    }
    this.test = new AbxTest(Number(this.field("trials").value));
    this.player.select(Number(this.field("excerpt").value));
    this.player.match(true);
    this.player.repeat(true);
    this.show("trial");
    this.hear("a");
    this.player.play();
    for (const which of ["a", "b"]) {
      const { text } = this.field(which).selectedOptions[0];
      this.trial.querySelector(`[data-hear=${which}] .what`).textContent = text;
    }
    // Not a button, so that Space is for playing.
    this.trial.focus();
  }

  hear(which) {
    this.heard = which;
    const hidden = this.test.isA ? "a" : "b";
    this.player.choose(this.choice[which === "x" ? hidden : which], true);
  }

  answer(saidA) {
    this.test.answer(saidA);
    if (this.test.finished) this.finish();
    else {
      this.hear("a");
      this.status.textContent = `${this.test.count} of ${this.test.trials} answered. Here is a new X.`;
    }
  }

  finish() {
    const { count, right } = this.test;
    this.player.pause();
    this.show("result");
    const p = binomialTail(right, count);
    const shown = p < 0.001 ? p.toExponential(1) : p.toFixed(3);
    document.getElementById("abx-score").textContent = `${right} of ${count} right`;
    document.getElementById("abx-p").textContent = `p = ${shown}`;
    document.getElementById("abx-p").dataset.p = p;
    document.getElementById("abx-meaning").textContent = count
      ? `A guesser gets at least ${right} right in ${(100 * p).toPrecision(2)} % of such tests. ` +
        (p < 0.05 ? "You most likely hear a difference." : "This does not show that you hear a difference.")
      : "Nothing was answered.";
    document.getElementById("abx-again").focus();
  }

  closed() {
    this.player.pause();
    this.player.match(this.before.matched);
    this.player.repeat(this.before.loop);
    this.player.choose(this.before.column);
  }

  key(key) {
    if (this.trial.hidden) return false;
    if (["a", "b", "x"].includes(key)) this.hear(key);
    else if (key === "1" || key === "2") this.answer(key === "1");
    else if (key === " ") this.player.toggle();
    else if (key === "arrowleft") this.player.seek(this.player.position - 1);
    else if (key === "arrowright") this.player.seek(this.player.position + 1);
    else return false;
    return true;
  }

  update() {
    if (!this.open || this.trial.hidden) return;
    for (const button of this.trial.querySelectorAll("[data-hear]")) {
      button.setAttribute("aria-pressed", String(button.dataset.hear === this.heard));
    }
    document.getElementById("abx-play").textContent = this.player.wanted ? "Pause" : "Play";
    document.getElementById("abx-count").textContent = `Trial ${this.test.count + 1} of ${this.test.trials}`;
  }
}

function fillChoice(select, names) {
  select.replaceChildren(...names.map((name, index) => new Option(name, index)));
}
